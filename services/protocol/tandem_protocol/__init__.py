"""The wire contract between trainer and generator, and the weight store they share. Never imports torch."""
