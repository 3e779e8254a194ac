"""FLAVA (Singh et al. 2022, arXiv 2112.04482): image, text and fusion encoders, pretrained with six losses."""
