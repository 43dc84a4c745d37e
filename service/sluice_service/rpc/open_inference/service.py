"""Registers the calls of inference.GRPCInferenceService, the field's own protocol."""

from sluice_service.rpc.open_inference.inference import OpenInferenceService

__all__ = ["OpenInferenceService"]
