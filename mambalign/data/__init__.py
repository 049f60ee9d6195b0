"""Chat templates, dataset mixes and packing: from files and hub ids to flat batches."""
