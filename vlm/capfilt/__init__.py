"""CapFilt (Li et al. 2022, section 3.3): better texts for web images, from a captioner and a filter."""
