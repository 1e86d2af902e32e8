"""Running plans on an accelerator: weighted sums piece by piece, matrix operators tensor by tensor, everything else here."""
