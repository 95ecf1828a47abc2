"""Complete programs that use int8_inductor on real models; run them from the repository's root."""
