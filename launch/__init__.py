"""The front door: command line, recipes, clusters; resolves a recipe into stage jobs and starts them."""
