{{- /* Fields that every pod's spec has; (list $ options). `options` is .Values.generator or .Values.trainer. */}}
{{- define "tandem.podOptions" -}}
{{- $ := index . 0 }}{{ $options := index . 1 -}}
serviceAccountName: {{ include "tandem.fullname" $ }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with include "tandem.affinity" . | fromYaml }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $options.topologySpreadConstraints }}
topologySpreadConstraints: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $options.schedulerName }}
schedulerName: {{ . }}
{{- end }}
{{- with $options.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $options.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $options.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $options.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* The pods' own affinity. If a claim is ReadWriteOnce, only one node can mount it: that of the generators. */}}
{{- define "tandem.affinity" -}}
{{- $ := index . 0 }}{{ $affinity := default dict (index . 1).affinity | deepCopy }}
{{- if include "tandem.oneNode" $ }}
  {{- $labels := include "tandem.selector" (list $ "generator") | fromYaml }}
  {{- $term := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" $labels) }}
  {{- $pods := default dict $affinity.podAffinity }}
  {{- $required := append (default list $pods.requiredDuringSchedulingIgnoredDuringExecution) $term }}
  {{- $_ := set $pods "requiredDuringSchedulingIgnoredDuringExecution" $required }}
  {{- $_ := set $affinity "podAffinity" $pods }}
{{- end }}
{{- toYaml $affinity }}
{{- end }}

{{- /* A pod's labels: the selector's, and those of the values, which cannot replace them; (list $ component options). */}}
{{- define "tandem.podLabels" -}}
{{- merge (include "tandem.selector" . | fromYaml) (index . 2).podLabels | toYaml }}
{{- end }}

{{- /* Additional environment variables of a container. */}}
{{- define "tandem.extraEnv" -}}
{{- $made := list }}
{{- range $name, $value := .env }}{{ $made = append $made (dict "name" $name "value" (toString $value)) }}{{ end }}
{{- with concat $made .extraEnv }}{{ toYaml . }}{{ end }}
{{- end }}

{{- define "tandem.securityContext" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- /* Resources of containers that only wait. */}}
{{- define "tandem.smallResources" -}}
resources:
  requests: {cpu: 50m, memory: 64Mi, ephemeral-storage: 64Mi}
  limits: {cpu: "1", memory: 256Mi, ephemeral-storage: 256Mi}
{{- end }}

{{- /* The start of a command that runs a script. tini passes a signal to every process of the script; sh as PID 1 ignores it. */}}
{{- define "tandem.shell" -}}
- tini
- -g
- --
- sh
- -ec
{{- end }}

{{- /* A shell script that fails if it cannot write to a volume; a list of mount points. fsGroup has no effect on some volumes. */}}
{{- define "tandem.checkVolumes" -}}
for volume in {{ join " " . }}; do
  if ! file=$(mktemp $volume/.writable.XXXXXX 2>&1); then
    echo "error: $volume (owner $(stat -c '%u:%g, mode %a' $volume)): got \"${file##*: }\", expected a volume that user 10001 may write to. NFS, hostPath and some CSI drivers ignore fsGroup. Fix: run chown 10001:10001 on its folder, on the server or on the node" >&2
    exit 1
  fi
  rm -f "$file"
done
{{- end }}

{{- /* A folder of this release: several releases may share a cache volume. */}}
{{- define "tandem.projectDir" -}}
/cache/projects/{{ include "tandem.fullname" . }}
{{- end }}

{{- /*
Where the trainer's pod puts the project, and the marker that it writes when the project is complete; (list $ hash). The
generators wait for the first part of the trainer's marker.
*/}}
{{- define "tandem.projectEnv" -}}
- name: TANDEM_PROJECT_DIR
  value: {{ include "tandem.projectDir" (index . 0) }}
- name: TANDEM_PROJECT_IDENTITY  # otherwise the path of the mount, which is another one in each pod
  value: chart
- name: TANDEM_PREPARED
  value: {{ index . 1 }}
{{- end }}

{{- /* A shell script that waits for this marker. */}}
{{- define "tandem.waitForProject" -}}
for _ in $(seq {{ div .Values.generator.startupBudgetSeconds 2 }}); do
  case "$(cat $TANDEM_PROJECT_DIR/.prepared 2>/dev/null)" in "$TANDEM_PREPARED"*) exit 0 ;; esac
  sleep 2
done
echo "error: the project was not ready within {{ .Values.generator.startupBudgetSeconds | int64 }} s (generator.startupBudgetSeconds). Fix: read the log of the container 'prepare' in the trainer's pod, which prepares it" >&2
exit 1
{{- end }}

{{- define "tandem.tokenSecret" -}}
{{ default (printf "%s-token" (include "tandem.fullname" .)) .Values.token.existingSecret }}
{{- end }}

{{- define "tandem.serviceEnv" -}}
- name: TANDEM_TOKEN_FILE
  value: /secrets/token
- name: TANDEM__SHARED__GENERATORS
  value: '["http://{{ include "tandem.fullname" . }}-generator:8000"]'
{{- end }}

{{- define "tandem.tokenVolume" -}}
- name: token
  secret:
    secretName: {{ include "tandem.tokenSecret" . }}
    items: [{key: {{ .Values.token.key }}, path: token}]
    defaultMode: 0440
{{- end }}

{{- /* Volumes that the pods of both services have; (list $ options). */}}
{{- define "tandem.volumes" -}}
{{- $ := index . 0 -}}
- name: tmp
  emptyDir: {sizeLimit: {{ (index . 1).tmpSize }}}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ (index . 1).shmSize }}}
{{ include "tandem.tokenVolume" $ }}
- name: weights
  persistentVolumeClaim: {claimName: {{ include "tandem.claimName" (list $ "weights") }}}
- name: cache
  persistentVolumeClaim: {claimName: {{ include "tandem.claimName" (list $ "cache") }}}
{{- with (index . 1).extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}
