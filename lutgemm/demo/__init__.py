"""`lutgemm demo`: a real language model, quantized and measured on the machine at hand (docs/demo.md)."""
