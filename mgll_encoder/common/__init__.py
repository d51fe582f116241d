"""What all three packages share: errors, command-line manners, files, images, patient-wise splits."""
