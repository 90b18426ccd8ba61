"""What one family of models computes: weights and state in, frames out."""
