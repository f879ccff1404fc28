{{- /*
The prefix of every object's name: the release's name as a DNS label of at most 30 characters, so that the name of a trainer's
pod fits too. Where it had to be changed, it ends in a hash of the whole: two releases with similar names would share objects.
*/}}
{{- define "tandem.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- $full = default $full .Values.fullnameOverride | trimSuffix "-" }}
{{- $label := regexReplaceAll "^([0-9])" ($full | replace "." "-") "r${1}" }}
{{- if or (gt (len $full) 30) (ne $full $label) }}
{{- $label = printf "%s-%s" ($label | trunc 21 | trimSuffix "-") ($full | sha256sum | trunc 8) }}
{{- end }}
{{- $label }}
{{- end }}

{{- /* Labels that selectors use; (list $ component). */}}
{{- define "tandem.selector" -}}
{{- $ := index . 0 -}}
app.kubernetes.io/name: {{ default $.Chart.Name $.Values.nameOverride | trunc 63 | trimSuffix "-" | quote }}
app.kubernetes.io/instance: {{ $.Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- /* Labels of an object; (list $ component). Pods do not get them: a new chart version would replace every pod. */}}
{{- define "tandem.labels" -}}
{{- $ := index . 0 -}}
{{ include "tandem.selector" . }}
app.kubernetes.io/version: {{ $.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $.Chart.Name $.Chart.Version | replace "+" "_" }}
{{- end }}

{{- /* Metadata of a workload: labels and annotations of the chart and of its values; (list $ component options). */}}
{{- define "tandem.workload" -}}
labels: {{- merge (include "tandem.labels" . | fromYaml) (index . 2).labels | toYaml | nindent 2 }}
{{- with (index . 2).annotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "tandem.image" -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag }}{{ end }}
{{- end }}

{{- /* Convert a Kubernetes quantity of bytes to MiB, rounded up. */}}
{{- define "tandem.mebibytes" -}}
{{- $bytes := dict "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "" 1.0 }}
{{- $number := regexFind "^[0-9.]+" (toString .) }}
{{- divf (mulf (float64 $number) (get $bytes (trimPrefix $number (toString .)))) 1048576.0 | ceil | int }}
{{- end }}

{{- /* Disk of a container: the size of its /tmp and room for its logs. */}}
{{- define "tandem.disk" -}}
{{ add 256 (include "tandem.mebibytes" . | int) }}Mi
{{- end }}

{{- /* Resources of a service's container: CPU, memory including /dev/shm, disk for /tmp and logs, and accelerators. */}}
{{- define "tandem.resources" -}}
{{- $shm := include "tandem.mebibytes" .shmSize | int }}
{{- $resources := deepCopy .resources }}
{{- range $kind := list "requests" "limits" }}
  {{- $part := get $resources $kind }}
  {{- $_ := set $part "memory" (printf "%dMi" (add $shm (include "tandem.mebibytes" $part.memory | int))) }}
  {{- $_ := set $part "ephemeral-storage" (include "tandem.disk" $.tmpSize) }}
  {{- if $.accelerator.count }}
    {{- $_ := set $part $.accelerator.resource ($.accelerator.count | int64 | toString) }}
  {{- end }}
{{- end }}
{{- toYaml $resources }}
{{- end }}
