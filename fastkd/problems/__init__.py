"""Problems that engines solve: each file has one, its op, and how losses are stated as it."""
