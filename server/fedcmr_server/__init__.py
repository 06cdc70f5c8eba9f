"""The coordinator: round rules, server optimisers and Flower ServerApp."""
