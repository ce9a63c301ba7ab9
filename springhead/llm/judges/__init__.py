"""Judges of answers: refusal, coherence, usefulness, agreement of rationale and response, an optional LLM judge."""
