{{- /*
The Job's name, which contains a hash of its pod template. Kubernetes does not allow a Job's template to change, so a change
has to create a new Job, which resumes the run.
*/}}
{{- define "tandem.trainerName" -}}
{{- $template := list (include "tandem.trainerJob" (list . "")) .Values.trainer.jobSet }}
{{- printf "%s-trainer-%s" (include "tandem.fullname" .) ($template | toJson | sha256sum | trunc 8) }}
{{- end }}

{{- /* The Job's spec; (list $ name). The name contains a hash of the spec, so the hash is computed with an empty name. */}}
{{- define "tandem.trainerJob" -}}
{{- $ := index . 0 }}{{ $name := index . 1 }}{{ $options := $.Values.trainer }}{{ $several := gt (int $options.nodes) 1 -}}
backoffLimit: {{ ternary 0 $options.backoffLimit $options.jobSet | int64 }}
completions: {{ $options.nodes | int64 }}
parallelism: {{ $options.nodes | int64 }}
completionMode: {{ ternary "Indexed" "NonIndexed" (or $several $options.jobSet) }}
podFailurePolicy:
  rules:
    - action: Ignore  # an eviction does not count as a failure
      onPodConditions: [{type: DisruptionTarget, status: "True"}]
    - action: Ignore  # 143: the pod was stopped before the run was over; another one resumes the run
      onExitCodes: {operator: In, values: [143]}
    - action: FailJob  # exit code 2 is a user error, which a retry would not fix
      onExitCodes: {operator: In, values: [2]}
template:
  metadata:
    labels: {{- include "tandem.podLabels" (list $ "trainer" $options) | nindent 6 }}
    annotations: {{- merge (dict "checksum/config" (include "tandem.trainerHash" $)) $options.podAnnotations | toYaml | nindent 6 }}
  spec:
    restartPolicy: Never
    {{- include "tandem.podOptions" (list $ $options) | nindent 4 }}
    terminationGracePeriodSeconds: {{ $options.terminationGracePeriodSeconds | int64 }}
    {{- if and $several (not $options.jobSet) }}
    subdomain: {{ include "tandem.fullname" $ }}-trainer
    {{- end }}
    initContainers:
      - name: prepare  # runs the same script as preflight in compose.yaml, after the previous trainer has ended
        image: {{ include "tandem.image" $options.image }}
        imagePullPolicy: {{ $options.image.pullPolicy }}
        command: {{- include "tandem.shell" . | nindent 10 }}
          - |
            {{- include "tandem.checkVolumes" (list "/weights" "/cache" "/runs") | nindent 12 }}
            {{- if $several }}
            if [ "$JOB_COMPLETION_INDEX" != 0 ]; then
              {{- include "tandem.waitForProject" $ | nindent 14 }}
            fi
            {{- end }}
            exec 9>> /weights/WRITER  # the lock of the store; this shell and what it starts hold it until they end
            flock --verbose --timeout {{ add 60 $options.terminationGracePeriodSeconds }} 9
            mkdir -p $TANDEM_PROJECT_DIR
            rm -f $TANDEM_PROJECT_DIR/.prepared
            python3 /opt/preflight.py
            printf %s $TANDEM_PREPARED > $TANDEM_PROJECT_DIR/.prepared.new
            mv $TANDEM_PROJECT_DIR/.prepared.new $TANDEM_PROJECT_DIR/.prepared
        env:
          {{- include "tandem.projectEnv" (list $ (include "tandem.trainerHash" $)) | nindent 10 }}
          - name: TANDEM_PROJECT_SOURCES
            value: {{ printf "%s:/config" (default "/source" $.Values.project.imagePath) }}
          {{- include "tandem.hubEnv" $ | nindent 10 }}
          {{- with include "tandem.scriptEnv" $options }}
          {{- . | nindent 10 }}
          {{- end }}
          {{- with include "tandem.extraEnv" $options }}
          {{- . | nindent 10 }}
          {{- end }}
        resources: {{- include "tandem.resources" (merge (dict "shmSize" "0" "accelerator" (dict "count" 0)) (omit $options "shmSize" "accelerator")) | nindent 10 }}
        {{- include "tandem.securityContext" $ | nindent 8 }}
        volumeMounts:
          - {name: tmp, mountPath: /tmp}
          - {name: config, mountPath: /config, readOnly: true}
          {{- if not $.Values.project.imagePath }}
          - {name: project, mountPath: /source, readOnly: true}
          {{- end }}
          - {name: cache, mountPath: /cache}
          - {name: weights, mountPath: /weights}
          - {name: runs, mountPath: /runs}
          {{- with $options.extraVolumeMounts }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
      {{- with $options.extraInitContainers }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    containers:
      - name: trainer
        image: {{ include "tandem.image" $options.image }}
        imagePullPolicy: {{ $options.image.pullPolicy }}
        args: [--config, {{ include "tandem.configPath" $ }}{{ if $options.script }}, --resume{{ end }}]
        env:
          {{- include "tandem.serviceEnv" $ | nindent 10 }}
          {{- include "tandem.hubEnv" $ | nindent 10 }}
          {{- if $.Values.environment.enabled }}
          - name: TANDEM_ENVIRONMENT_TOKEN_FILE
            value: /environment-secrets/token
          - name: TANDEM__TRAINER__ROLLOUT__ENVIRONMENT_URLS
            value: '["http://{{ include "tandem.fullname" $ }}-environment:8100"]'
          {{- end }}
          {{- with include "tandem.scriptEnv" $options }}
          {{- . | nindent 10 }}
          - name: TANDEM_SCRIPT_FOLDER
            value: {{ include "tandem.projectDir" $ }}
          {{- end }}
          - name: TANDEM_TRAINER_PROCESSES
            value: {{ max 1 $options.accelerator.count | quote }}
          - name: TANDEM__TRAINER__METRICS_PORT
            value: "9400"
          - name: TORCH_ELASTIC_SHUTDOWN_TIMEOUT  # less than the pod's grace period
            value: {{ max 10 (sub $options.terminationGracePeriodSeconds 30) | quote }}
          {{- if $several }}
          - name: TANDEM_TRAINER_NODES
            value: {{ $options.nodes | int64 | quote }}
          - name: TANDEM_TRAINER_NODE_RANK
            valueFrom: {fieldRef: {fieldPath: "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
          - name: TANDEM_TRAINER_RENDEZVOUS
            value: {{ ternary (printf "%s-node-0-0.%s" $name $name) (printf "%s-0.%s-trainer" $name (include "tandem.fullname" $)) $options.jobSet }}:29500
          {{- end }}
          {{- with include "tandem.extraEnv" $options }}
          {{- . | nindent 10 }}
          {{- end }}
        ports:
          - {name: metrics, containerPort: 9400}
        resources: {{- include "tandem.resources" $options | nindent 10 }}
        {{- include "tandem.securityContext" $ | nindent 8 }}
        volumeMounts:
          - {name: tmp, mountPath: /tmp}
          - {name: shm, mountPath: /dev/shm}
          - {name: token, mountPath: /secrets, readOnly: true}
          {{- if $.Values.environment.enabled }}
          - {name: environment-token, mountPath: /environment-secrets, readOnly: true}
          {{- end }}
          - {name: cache, mountPath: /cache}
          - {name: weights, mountPath: /weights}
          - {name: runs, mountPath: /runs}
          {{- with $options.extraVolumeMounts }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
    volumes:
      {{- include "tandem.volumes" (list $ $options) | nindent 6 }}
      {{- if $.Values.environment.enabled }}
      {{- include "tandem.environmentTokenVolume" $ | nindent 6 }}
      {{- end }}
      - name: runs
        persistentVolumeClaim: {claimName: {{ include "tandem.claimName" (list $ "runs") }}}
      - name: config
        configMap: {name: {{ include "tandem.fullname" $ }}-config}
      {{- if not $.Values.project.imagePath }}
      - name: project
        {{- if $.Values.project.existingClaim }}
        persistentVolumeClaim: {claimName: {{ $.Values.project.existingClaim }}, readOnly: true}
        {{- else }}
        configMap: {name: {{ default (printf "%s-project" (include "tandem.fullname" $)) $.Values.project.configMap }}}
        {{- end }}
      {{- end }}
{{- end }}

{{- /* How the trainer's pod reaches the Hugging Face Hub: with `offline`, not at all. */}}
{{- define "tandem.hubEnv" -}}
{{- if .Values.offline -}}
- name: HF_HUB_OFFLINE
  value: "1"
{{- else if .Values.huggingFace.existingSecret -}}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .Values.huggingFace.existingSecret }}, key: {{ .Values.huggingFace.key }}}}
{{- end }}
{{- end }}

{{- /* The TRL script that the trainer runs, if it runs one. */}}
{{- define "tandem.scriptEnv" -}}
{{- with .script -}}
- name: TANDEM_SCRIPT
  value: {{ . | quote }}
{{- end }}
{{- end }}
