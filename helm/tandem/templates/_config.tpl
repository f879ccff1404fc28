{{- /* The run's config.yaml: `config`, or the demo's with `config` laid over it. */}}
{{- define "tandem.config" -}}
{{- $config := .Values.config }}
{{- if kindIs "string" $config }}
  {{- $config = fromYaml $config }}
  {{- with $config.Error }}{{ fail (printf "config: got text that is no YAML: %s" .) }}{{ end }}
{{- end }}
{{- if include "tandem.isDemo" . }}
  {{- $config = mergeOverwrite (fromYaml (.Files.Get "files/digits/config.yaml")) (deepCopy $config) }}
{{- end }}
{{- toYaml $config }}
{{- end }}

{{- /* Not empty when no project is named. */}}
{{- define "tandem.isDemo" -}}
{{- with .Values.project }}{{ if not (or .files .configMap .existingClaim .imagePath) }}yes{{ end }}{{ end }}
{{- end }}

{{- /* The project's files as far as the chart has them, name → content. */}}
{{- define "tandem.projectFiles" -}}
{{- if include "tandem.isDemo" . }}
{{- (.Files.Glob "files/digits/*.py").AsConfig }}
{{- else }}
{{- toYaml .Values.project.files }}
{{- end }}
{{- end }}

{{- /* Changes when a generator has to start again: not with the trainer's options. */}}
{{- define "tandem.generatorHash" -}}
{{- $config := include "tandem.config" . | fromYaml }}
{{- list (pick $config "shared" "generator") (include "tandem.projectFiles" .) .Values.project | toJson | sha256sum | trunc 10 }}
{{- end }}

{{- /* How long a weight switch may take, and running requests after SIGTERM; (list $ key default), seconds. */}}
{{- define "tandem.generatorSeconds" -}}
{{- $config := include "tandem.config" (index . 0) | fromYaml }}
{{- dig "generator" (index . 1) (index . 2) $config | float64 | ceil | int }}
{{- end }}
