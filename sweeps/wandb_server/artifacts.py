"""GraphQL operations about artifacts: files with a manifest, logged by one run and used by others."""

from __future__ import annotations

from typing import Any

from sweeps.wandb_server.state import ENTITY, Artifact, ServerState

Variables = dict[str, Any]
CREATED_AT = "2026-01-01T00:00:00"  # the client requires a time and does not use it


class ArtifactOperations:
    """Operations about artifacts."""

    def __init__(self, state: ServerState, url: str) -> None:
        self.state, self.url = state, url

    def op_CreateArtifact(self, variables: Variables) -> Variables:
        given = variables["input"]
        name, kind = given["artifactCollectionName"], given["artifactTypeName"]
        versions = [one for one in self.state.artifacts.values() if one.name == name]
        artifact_id = self.state.next_id("artifact")
        artifact = Artifact(name, kind, "PENDING", given.get("runName") or "", given.get("digest") or "", len(versions))
        self.state.artifacts[artifact_id] = artifact
        if artifact.run:
            self.state.get_run(artifact.run).logged.append(artifact.path)
        sequence = {"latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": artifact_id, "state": "PENDING", "artifactSequence": sequence}}}

    def op_CreateArtifactManifest(self, variables: Variables) -> Variables:
        manifest = f"manifest-{variables['artifactID']}"
        return {"createArtifactManifest": {"artifactManifest": self._render_manifest(manifest)}}

    def op_UpdateArtifactManifest(self, variables: Variables) -> Variables:
        return {"updateArtifactManifest": {"artifactManifest": self._render_manifest(variables["artifactManifestID"])}}

    def op_CreateArtifactFiles(self, variables: Variables) -> Variables:
        edges = []
        for file in variables["input"]["artifactFiles"]:
            path = f"artifacts/{file['artifactID']}/{file['name']}"
            node = {
                "storagePath": path,
                "uploadUrl": f"{self.url}/storage/{path}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": file["artifactID"]},
            }
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def op_CommitArtifact(self, variables: Variables) -> Variables:
        artifact = self.state.artifacts[variables["artifactID"]]
        artifact.state = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": artifact.digest}}}

    def op_UseArtifact(self, variables: Variables) -> Variables:
        given = variables.get("input", variables)  # the client's core sends one form, its Python code the other
        self.state.get_run(given["runName"]).used.append(self.state.artifacts[given["artifactID"]].path)
        return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}

    def op_ArtifactType(self, variables: Variables) -> Variables:
        number = self._find_artifact(variables["name"])
        found = {"artifactType": {"name": self.state.artifacts[number].type}} if number else None
        return {"project": {"artifact": found}}

    def op_ArtifactByID(self, variables: Variables) -> Variables:
        number = variables["id"]
        return {"artifact": self._render_artifact(number) if number in self.state.artifacts else None}

    def op_ArtifactMembershipByName(self, variables: Variables) -> Variables:
        number = self._find_artifact(variables["name"])
        if number is None:
            return {"project": {"artifactCollectionMembership": None}}
        artifact = self.state.artifacts[number]
        membership = {
            "id": f"membership {number}",
            "versionIndex": artifact.version,
            "createdAt": CREATED_AT,
            "aliases": [],
            "artifactCollection": self._render_collection(artifact),
            "artifact": self._render_artifact(number),
        }
        return {"project": {"artifactCollectionMembership": membership}}

    def op_FetchArtifactDigestAlgorithm(self, _: Variables) -> Variables:
        return {"project": None}

    def op_XXHashDigestsEnabled(self, _: Variables) -> Variables:
        return {"entity": None}

    def op_ClientIDMapping(self, variables: Variables) -> Variables:
        return {"clientIDMapping": {"serverID": variables["clientID"]}}

    def _find_artifact(self, name: str) -> str | None:
        """Find the id of the artifact "name:v0" or "name:latest"; None if there is none."""
        name, _, version = name.partition(":")
        versions = [artifact_id for artifact_id, one in self.state.artifacts.items() if one.name == name]
        if not version or version == "latest":
            return versions[-1] if versions else None
        return next(
            (artifact_id for artifact_id in versions if f"v{self.state.artifacts[artifact_id].version}" == version),
            None,
        )

    def _render_artifact(self, number: str) -> Variables:
        artifact = self.state.artifacts[number]
        nothing = dict.fromkeys("description metadata historyStep commitHash updatedAt digestAlgorithm".split())
        return nothing | {
            "__typename": "Artifact",
            "id": number,
            "artifactSequence": self._render_collection(artifact),
            "versionIndex": artifact.version,
            "artifactType": {"name": artifact.type},
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [],
            "state": artifact.state,
            "size": 0,
            "digest": artifact.digest,
            "fileCount": 0,
            "createdAt": CREATED_AT,
            "aliases": [],
        }

    def _render_collection(self, artifact: Artifact) -> Variables:
        project = self.state.get_run(artifact.run).project
        place = {"id": f"project {project}", "internalId": "1", "name": project, "entity": {"name": ENTITY}}
        return {"__typename": "ArtifactSequence", "name": artifact.name, "project": place}

    def _render_manifest(self, manifest: str) -> Variables:
        upload = {"uploadUrl": f"{self.url}/storage/{manifest}", "uploadHeaders": []}
        return {"id": manifest, "file": {"id": manifest, **upload}}
