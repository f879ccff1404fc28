{{- /*
All problems of the values, one per line. helm has already compared the values with values.schema.json. That leaves the text of a
config.yaml (--set-file), keys that are missing after the demo's configuration has been merged, and values that contradict others.
*/}}
{{- define "tandem.problems" -}}
{{- $schema := .Files.Get "files/config.schema.json" | fromJson }}
{{- include "tandem.walk" (dict "schema" $schema "node" $schema "value" (include "tandem.config" . | fromYaml) "path" "/config" "partial" .Values.trainer.script) }}
{{- include "tandem.contradictions" . }}
{{- range $name := keys .Values.storage | sortAlpha }}
  {{- $claim := include "tandem.claimName" (list $ $name) }}
  {{- if dig "metadata" "deletionTimestamp" "" (lookup "v1" "PersistentVolumeClaim" $.Release.Namespace $claim) }}
the claim {{ $claim }}: got one that is being deleted, expected none or one that stays. A release on it would lose it. Fix: wait with `kubectl -n {{ $.Release.Namespace }} wait --for=delete pvc/{{ $claim }}`, and use `helm uninstall --wait` next time
  {{- end }}
{{- end }}
{{- end }}

{{- /* Compare .value with a .node of .schema: keys, types, patterns and enumerations, in helm's own words. */}}
{{- define "tandem.walk" -}}
{{- $ := . }}{{ $node := .node }}{{ $value := .value }}
{{- with index $node "$ref" }}{{ $node = get (index $.schema "$defs") (trimPrefix "#/$defs/" .) }}{{ end }}
{{- $kinds := dict "map" "object" "slice" "array" "string" "string" "bool" "boolean" "float64" "number" "invalid" "null" }}
{{- $got := get $kinds (kindOf $value) }}
{{- $types := ternary $node.type (compact (list $node.type)) (kindIs "slice" $node.type) }}
{{- if and (eq $got "number") (has "integer" $types) (eq (floor $value) $value) }}{{ $got = "integer" }}{{ end }}
{{- if and $types (not (has $got $types)) }}
at '{{ .path }}': got {{ $got }}, want {{ join " or " $types }}
{{- else if and $node.enum (not (has $value $node.enum)) }}
at '{{ .path }}': value must be one of {{ join ", " $node.enum }}
{{- else if and $node.pattern (eq $got "string") }}{{ if not (regexMatch $node.pattern $value) }}
at '{{ .path }}': '{{ $value }}' does not match pattern '{{ $node.pattern }}'
{{- end }}
{{- else if eq $got "object" }}
  {{- range $key, $child := $value }}
    {{- if hasKey (default dict $node.properties) $key }}
      {{- include "tandem.walk" (dict "schema" $.schema "node" (get $node.properties $key) "value" $child "path" (printf "%s/%s" $.path $key) "partial" $.partial) }}
    {{- else if eq (toString $node.additionalProperties) "false" }}
at '{{ $.path }}': additional properties '{{ $key }}' not allowed
    {{- end }}
  {{- end }}
  {{- range $key := $node.required }}{{ if not (or $.partial (hasKey $value $key)) }}
at '{{ $.path }}': missing property '{{ $key }}'
  {{- end }}{{ end }}
{{- else if and (eq $got "array") $node.items }}
  {{- range $i, $child := $value }}
    {{- include "tandem.walk" (dict "schema" $.schema "node" $node.items "value" $child "path" (printf "%s/%d" $.path $i) "partial" $.partial) }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* Values that are valid alone but not together. */}}
{{- define "tandem.contradictions" -}}
{{- $config := include "tandem.config" . | fromYaml }}
{{- with .Values.project }}
  {{- $sources := list }}
  {{- range $name := list "files" "configMap" "existingClaim" "imagePath" }}
    {{- if get $.Values.project $name }}{{ $sources = append $sources (printf "project.%s" $name) }}{{ end }}
  {{- end }}
  {{- if gt (len $sources) 1 }}
{{ join ", " $sources }}: got {{ len $sources }} sources of the project, expected 1. Fix: keep one of them and remove the others
  {{- end }}
  {{- if and $sources (not $.Values.config) (not $.Values.trainer.script) }}
config: got an empty value with {{ first $sources }}, expected the project's config.yaml. Fix: --set-file config=my-project/config.yaml
  {{- end }}
{{- end }}
{{- with .Values.trainer }}{{ if .script }}
  {{- if include "tandem.isDemo" $ }}
trainer.script: got {{ .script }} without the project that has it, expected one of project.files, configMap, existingClaim and imagePath. Fix: --set-file 'project.files.train\.py=train.py'
  {{- end }}
  {{- if and (not .image.digest) (has .image.tag (list "cpu" "cuda")) }}
trainer.image.tag: got {{ .image.tag }} with trainer.script, expected an image that has TRL. Fix: set it to trl-{{ .image.tag }}, a target of docker/trainer.Dockerfile
  {{- end }}
{{- end }}{{ end }}
{{- with .Values.generator }}
  {{- $devices := mul .accelerator.count .nodesPerReplica }}
  {{- $groups := include "tandem.tensorGroups" $ }}
  {{- if mod $devices $groups }}
    {{- if eq $groups (toString .dataParallelSize) }}
generator.dataParallelSize: got {{ .dataParallelSize }} for the {{ $devices }} devices of a replica, expected a divisor of {{ $devices }}
    {{- else }}
generator.dataParallelSize: got {{ .dataParallelSize }} with pipeline_parallel_size {{ div $groups .dataParallelSize }} for the {{ $devices }} devices of a replica, expected dataParallelSize × pipeline_parallel_size to divide {{ $devices }}
    {{- end }}
  {{- end }}
  {{- if and (gt (int .nodesPerReplica) 1) (not .accelerator.count) }}
generator.nodesPerReplica: got {{ .nodesPerReplica }} with generator.accelerator.count 0, expected devices on each of these nodes. Fix: set generator.accelerator.count
  {{- end }}
  {{- if .accelerator.count }}
    {{- range $name := list "tensor_parallel_size" "data_parallel_size" }}
      {{- if dig "generator" $name "" $config }}
config.generator.{{ $name }}: got {{ dig "generator" $name "" $config }}, expected no value: the chart computes it from generator.accelerator.count, nodesPerReplica and dataParallelSize. Fix: remove it
      {{- end }}
    {{- end }}
  {{- end }}
{{- end }}
{{- $config := include "tandem.config" . | fromYaml }}
{{- with dig "trainer" "rollout" "agent" "" $config }}{{ if $.Values.environment.enabled }}
environment.enabled: got true with config.trainer.rollout.agent {{ . }}, expected false: an agent runs in the trainer's process. Fix: set it to false
{{- end }}{{ end }}
{{- range $service := list "generator" "trainer" }}
  {{- range $name := list "NVIDIA_VISIBLE_DEVICES" "CUDA_VISIBLE_DEVICES" }}
    {{- if hasKey (get $.Values $service).env $name }}
{{ $service }}.env.{{ $name }}: got devices by name, expected them from the device plugin, which gives each device to one pod. Fix: remove it and set {{ $service }}.accelerator
    {{- end }}
  {{- end }}
{{- end }}
{{- range $service := list "generator" "trainer" "environment" "watch" }}{{ if (get $.Values $service).enabled | default (not (hasKey (get $.Values $service) "enabled")) }}
  {{- with (get $.Values $service).image }}{{ if and (not .digest) (has .tag (list "" "latest")) }}
{{ $service }}.image.tag: got {{ .tag | quote }}, expected a fixed version, because this tag can change between two pods. Fix: set another tag or {{ $service }}.image.digest
  {{- end }}{{ end }}
{{- end }}{{ end }}
{{- if .Values.watch.enabled }}
  {{- if and (eq .Values.storage.runs.accessMode "ReadWriteOnce") (not (include "tandem.oneNode" .)) }}
watch.enabled: got true with storage.runs.accessMode ReadWriteOnce, expected ReadWriteMany: the page and the trainer mount the claim, perhaps on two nodes. Fix: set storage.runs.accessMode=ReadWriteMany, or on a single node storage.weights.accessMode=ReadWriteOnce too
  {{- end }}
  {{- if and .Values.watch.ingress.enabled (not .Values.watch.ingress.host) }}
watch.ingress.host: got an empty name with watch.ingress.enabled, expected the host name of the page. Fix: --set watch.ingress.host=watch.example.com
  {{- end }}
{{- end }}
{{- $several := or (gt (int .Values.trainer.nodes) 1) (gt (int .Values.generator.nodesPerReplica) 1) }}
{{- range $name, $storage := .Values.storage }}
  {{- if and $several (eq $storage.accessMode "ReadWriteOnce") (or (ne $name "runs") (gt (int $.Values.trainer.nodes) 1)) }}
storage.{{ $name }}.accessMode: got ReadWriteOnce with several nodes, but only one node can mount such a volume; expected ReadWriteMany. Fix: set ReadWriteMany, or trainer.nodes and generator.nodesPerReplica to 1
  {{- end }}
{{- end }}
{{- end }}
