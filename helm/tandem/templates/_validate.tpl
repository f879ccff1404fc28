{{- /*
All problems of the values, one per line. Unknown keys are found here and not by helm's own schema check, because that
check cannot suggest a key. So the schema's objects do not set `additionalProperties: false`; here, an object without
`additionalProperties` accepts only the keys in its `properties`.
*/}}
{{- define "tandem.problems" -}}
{{- $schema := .Files.Get "files/schema.json" | fromJson }}
{{- $walk := dict "schema" $schema "known" list "unknown" list }}
{{- include "tandem.walk" (dict "walk" $walk "node" $schema "values" (omit .Values "global") "path" "") }}
{{- range $walk.unknown }}
{{ include "tandem.didYouMean" (dict "path" . "known" $walk.known) }}
{{- end }}
{{- include "tandem.contradictions" . }}
{{- range $name := keys .Values.storage | sortAlpha }}
  {{- $claim := include "tandem.claimName" (list $ $name) }}
  {{- if dig "metadata" "deletionTimestamp" "" (lookup "v1" "PersistentVolumeClaim" $.Release.Namespace $claim) }}
the claim {{ $claim }}: got one that is being deleted, expected none or one that stays. A release on it would lose it. Fix: wait with `kubectl -n {{ $.Release.Namespace }} wait --for=delete pvc/{{ $claim }}`, and use `helm uninstall --wait` next time
  {{- end }}
{{- end }}
{{- end }}

{{- /* Collect into .walk the dotted keys of the schema (`known`) and the values' keys that it lacks (`unknown`). */}}
{{- define "tandem.walk" -}}
{{- $node := .node }}
{{- with index $node "$ref" }}{{ $node = get (index $.walk.schema "$defs") (base .) }}{{ end }}
{{- if and $node.properties (not (hasKey $node "additionalProperties")) }}
  {{- range $key, $child := $node.properties }}
    {{- $path := printf "%s%s" $.path $key }}
    {{- $_ := set $.walk "known" (append $.walk.known $path) }}
    {{- include "tandem.walk" (dict "walk" $.walk "node" $child "values" (get (default dict $.values) $key) "path" (printf "%s." $path)) }}
  {{- end }}
  {{- range $key, $_ := $.values }}
    {{- if not (hasKey $node.properties $key) }}
      {{- $_ := set $.walk "unknown" (append $.walk.unknown (printf "%s%s" $.path $key)) }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* Report an unknown key. Suggest the key whose last word shares the most pairs of letters; siblings score higher. */}}
{{- define "tandem.didYouMean" -}}
{{- $pairs := include "tandem.pairs" .path | fromJsonArray }}
{{- $best := dict "score" 0.0 "path" "" }}
{{- range .known }}
  {{- $other := include "tandem.pairs" . | fromJsonArray }}
  {{- $common := 0 }}
  {{- range $other }}{{ if has . $pairs }}{{ $common = add1 $common }}{{ end }}{{ end }}
  {{- $score := divf (mulf 2.0 $common) (add 1 (len $pairs) (len $other)) }}
  {{- if eq (dir (replace "." "/" .)) (dir (replace "." "/" $.path)) }}{{ $score = mulf $score 1.2 }}{{ end }}
  {{- if gt $score $best.score }}{{ $best = dict "score" $score "path" . }}{{ end }}
{{- end -}}
{{ .path }}: unknown value; {{ if gt $best.score 0.3 -}}
did you mean {{ $best.path }}?
{{- else -}}
`helm show values` lists all values
{{- end }}
{{- end }}

{{- /* Pairs of neighbouring letters in the last word of a dotted key, with ^ before it and $ after it. */}}
{{- define "tandem.pairs" -}}
{{- $word := printf "^%s$" (splitList "." . | last | lower) }}
{{- $pairs := list }}
{{- range $i := until (sub (len $word) 1 | int) }}{{ $pairs = append $pairs (substr $i (add $i 2 | int) $word) }}{{ end }}
{{- toJson $pairs }}
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
  {{- if and $sources (not $.Values.config) }}
config: got an empty value with {{ first $sources }}, expected the project's config.yaml. Fix: --set-file config=my-project/config.yaml
  {{- end }}
{{- end }}
{{- with .Values.generator }}
  {{- $devices := mul .accelerator.count .nodesPerReplica }}
  {{- $groups := include "tandem.tensorGroups" $ }}
  {{- if mod $devices $groups }}
generator.dataParallelSize: got {{ .dataParallelSize }}{{ if ne $groups (toString .dataParallelSize) }} (with pipeline_parallel_size {{ $groups }}){{ end }} for the {{ $devices }} devices of a replica, expected a divisor of {{ $devices }}
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
{{- range $service := list "generator" "trainer" }}
  {{- range $name := list "NVIDIA_VISIBLE_DEVICES" "CUDA_VISIBLE_DEVICES" }}
    {{- if hasKey (get $.Values $service).env $name }}
{{ $service }}.env.{{ $name }}: got devices by name, expected them from the device plugin, which gives each device to one pod. Fix: remove it and set {{ $service }}.accelerator
    {{- end }}
  {{- end }}
  {{- with (get $.Values $service).image }}{{ if and (not .digest) (has .tag (list "" "latest")) }}
{{ $service }}.image.tag: got {{ .tag | quote }}, expected a fixed version, because this tag can change between two pods. Fix: set another tag or {{ $service }}.image.digest
  {{- end }}{{ end }}
{{- end }}
{{- $several := or (gt (int .Values.trainer.nodes) 1) (gt (int .Values.generator.nodesPerReplica) 1) }}
{{- range $name, $storage := .Values.storage }}
  {{- if and $several (eq $storage.accessMode "ReadWriteOnce") (or (ne $name "runs") (gt (int $.Values.trainer.nodes) 1)) }}
storage.{{ $name }}.accessMode: got ReadWriteOnce with several nodes, but only one node can mount such a volume; expected ReadWriteMany. Fix: set ReadWriteMany, or trainer.nodes and generator.nodesPerReplica to 1
  {{- end }}
{{- end }}
{{- end }}
