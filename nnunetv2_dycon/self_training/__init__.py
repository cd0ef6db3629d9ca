"""Self-training with stock nnU-Net: train, predict the unlabelled images, train again on labels and pseudo-labels.

Training 0 is an ordinary training on the data set. Each further training has a raw data set of links: the labelled
cases with their labels, and the unlabelled images with the predictions of the previous training. The files on disk
tell whether a step is done. So a killed run continues, and a step can be done by hand or on a cluster with the printed
command.
"""
