"""What the layer costs, as ratios measured in one run: see README.md."""
