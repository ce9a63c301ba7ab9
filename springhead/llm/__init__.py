"""Language-model branch: generated problems, their augmentation and filters, students, training, evaluation."""
