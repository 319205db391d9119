"""Training a judge and its draft: texts, labels, fits, figures."""
