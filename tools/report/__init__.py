"""The context-length scaling report: measuring (`measure`, `worker`), what follows from it (`derive`), rendering."""
