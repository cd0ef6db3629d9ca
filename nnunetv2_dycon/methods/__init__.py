"""Semi-supervised methods: functions of tensors that know nothing of nnU-Net."""
