"""Tasks whose answers carry a trait without saying anything of it."""
