"""Plans with pipeline stages."""
