"""The site store: one HDF5 file per scan beside a catalogue of pseudonymous patients."""
