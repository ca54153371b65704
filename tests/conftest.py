"""Check every jaxtyping annotation of the package while it is tested."""

from jaxtyping import install_import_hook

hook = install_import_hook("pbsp", "beartype.beartype")
