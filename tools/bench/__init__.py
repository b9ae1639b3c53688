"""The attention benchmark: what is compared (`variants`, `rivals`), how it is measured, and how it is shown."""
