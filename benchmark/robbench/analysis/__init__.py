"""Why a model is robust: its logits, its representations, and an analytic model of both."""
