"""Low-rank adapters as what they are: read, added to models, merged with each other, extracted and written."""
