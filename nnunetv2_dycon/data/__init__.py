"""Data of a semi-supervised training: roles of cases, prepared unlabelled images, the mixed batch."""
