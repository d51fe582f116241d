"""Code shared by all three packages: errors, command-line behavior, files, images, splits by patient."""
