"""Converters of public data sets to nnU-Net raw data sets; installed as nnunetv2_dycon.dataset_conversion."""
