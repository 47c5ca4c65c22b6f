"""Studies: questions that one run cannot answer, each asked in a module of its own."""
