"""Public collections and users' own data into nnU-Net raw data sets with labelled and unlabelled cases."""
