"""Self-training with stock nnU-Net: train, predict the unlabelled images, train anew on labels and pseudo-labels.

Training 0 is an ordinary one of the data set. Each further training has a raw data set of its own, made of links: the
labelled cases with their labels, the unlabelled images with the predictions of the training before. Whether a
step is done is seen on disk alone, so that a killed run goes on, and a step may be done by hand or on a cluster with
the command that is printed.
"""
