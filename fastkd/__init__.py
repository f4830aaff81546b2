"""fastkd: every knowledge-distillation loss, exact, lean and fast."""
