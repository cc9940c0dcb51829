"""What an exported model is in `transformers`: files that are copied into its folder."""
