"""The ring on paper: what the Plan makes each rank do (`work`), how fast (`machine`), and when it ends (`events`)."""
