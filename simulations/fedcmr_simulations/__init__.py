"""Virtual hospitals: phantom, simulated centres, federation runner and report."""
