"""What a model's config.json says: of the decoder, its blocks, rotations, experts and recurrent layers."""
