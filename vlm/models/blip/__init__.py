"""BLIP (Li et al. 2022, arXiv 2201.12086): captioning, question answering, retrieval with matching, pretraining."""
