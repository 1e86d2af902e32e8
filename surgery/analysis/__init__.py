"""What singular values say of a fine-tune, matrix by matrix."""
