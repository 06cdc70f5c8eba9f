"""The hospital: site store, importers, trainer and Flower ClientApp."""
