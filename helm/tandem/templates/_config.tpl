{{- /* The run's config.yaml: `config`, or for the demo its config.yaml with `config` merged over it. */}}
{{- define "tandem.config" -}}
{{- $config := .Values.config }}
{{- if kindIs "string" $config }}
  {{- $config = fromYaml $config }}
  {{- with $config.Error }}{{ fail (printf "config: got invalid YAML, expected the text of a config.yaml: %s" .) }}{{ end }}
{{- end }}
{{- if include "tandem.isDemo" . }}
  {{- $config = mergeOverwrite (fromYaml (.Files.Get "files/digits/config.yaml")) (deepCopy $config) }}
{{- end }}
{{- toYaml $config }}
{{- end }}

{{- /* The file of the configuration in the prepared project. For a script, the trainer's pod writes it, from tandem.yaml. */}}
{{- define "tandem.configPath" -}}
{{ include "tandem.projectDir" . }}/{{ if .Values.trainer.script }}.tandem-{{ end }}config.yaml
{{- end }}

{{- /* Not empty if no source of a project is set: the chart runs the demo. */}}
{{- define "tandem.isDemo" -}}
{{- with .Values.project }}{{ if not (or .files .configMap .existingClaim .imagePath) }}yes{{ end }}{{ end }}
{{- end }}

{{- /* The project's files that the chart knows: a map from name to content. */}}
{{- define "tandem.projectFiles" -}}
{{- if include "tandem.isDemo" . }}
{{- (.Files.Glob "files/digits/*.py").AsConfig }}
{{- else }}
{{- toYaml .Values.project.files }}
{{- end }}
{{- end }}

{{- /* A hash of everything that a generator reads when it starts. Options of the trainer do not change it. */}}
{{- define "tandem.generatorHash" -}}
{{- $config := include "tandem.config" . | fromYaml }}
{{- $parts := list (pick $config "shared" "generator") (include "tandem.projectFiles" .) .Values.project }}
{{- with .Values.trainer.script }}{{ $parts = append $parts . }}{{ end }}{{/* it says which model to load */}}
{{- $parts | toJson | sha256sum | trunc 10 }}
{{- end }}

{{- /* A hash of everything that a trainer reads when it starts. It begins with the hash for the generators. */}}
{{- define "tandem.trainerHash" -}}
{{- $all := list (include "tandem.config" .) (include "tandem.projectFiles" .) .Values.project }}
{{- printf "%s-%s" (include "tandem.generatorHash" .) ($all | toJson | sha256sum | trunc 10) }}
{{- end }}

{{- /* A duration from the generator's configuration, in whole seconds, rounded up; (list $ key default). */}}
{{- define "tandem.generatorSeconds" -}}
{{- $config := include "tandem.config" (index . 0) | fromYaml }}
{{- dig "generator" (index . 1) (index . 2) $config | float64 | ceil | int }}
{{- end }}
