"""Problems: what an engine solves. Each file has a problem, its op, and how losses are stated as it."""
