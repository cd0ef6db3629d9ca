"""Pictures of data sets and trainings, one file for each."""
