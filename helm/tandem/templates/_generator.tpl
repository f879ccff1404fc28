{{- /* A generator's pod template; (dict "root" $ "component" … "args" …). StatefulSet and LeaderWorkerSet use it. */}}
{{- define "tandem.generatorPod" -}}
{{- $ := .root }}{{ $options := $.Values.generator -}}
metadata:
  labels:
    {{- include "tandem.podLabels" (list $ .component $options) | nindent 4 }}
    tandem/generator-config: {{ include "tandem.generatorHash" $ | quote }}
  {{- with $options.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "tandem.podOptions" (list $ $options) | nindent 2 }}
  terminationGracePeriodSeconds: {{ add 15 (include "tandem.generatorSeconds" (list $ "shutdown_timeout_s" 30)) }}
  initContainers:
    - name: project  # waits for the project; makes the folder of leases, which the generator cannot
      image: {{ include "tandem.image" $options.image }}
      imagePullPolicy: {{ $options.image.pullPolicy }}
      command: {{- include "tandem.shell" . | nindent 8 }}
        - |
          {{- include "tandem.checkVolumes" (list "/weights") | nindent 10 }}
          mkdir -p /weights/served
          {{- include "tandem.waitForProject" $ | nindent 10 }}
      env: {{- include "tandem.projectEnv" (list $ (include "tandem.generatorHash" $)) | nindent 8 }}
      {{- include "tandem.smallResources" $ | nindent 6 }}
      {{- include "tandem.securityContext" $ | nindent 6 }}
      volumeMounts:
        - {name: cache, mountPath: /cache, readOnly: true}
        - {name: weights, mountPath: /weights}
    {{- with $options.extraInitContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  containers:
    - name: generator
      image: {{ include "tandem.image" $options.image }}
      imagePullPolicy: {{ $options.image.pullPolicy }}
      args: {{- concat (list "--config" (include "tandem.configPath" $)) .args | toYaml | nindent 8 }}
      env:
        {{- include "tandem.serviceEnv" $ | nindent 8 }}
        - name: HF_HUB_OFFLINE  # the trainer's pod has already downloaded the model
          value: "1"
        {{- if not (dig "generator" "materialize_dir" "" (include "tandem.config" $ | fromYaml)) }}
        - name: TANDEM__GENERATOR__MATERIALIZE_DIR  # a pod that fills /tmp would be evicted; this only gets full
          value: /dev/shm
        {{- end }}
        {{- with include "tandem.parallel" $ }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- with include "tandem.extraEnv" $options }}
        {{- . | nindent 8 }}
        {{- end }}
      {{- if eq .component "generator" }}
      ports:
        - {name: http, containerPort: 8000}
      startupProbe:
        httpGet: {path: /healthz, port: http}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: {{ max 1 (div $options.startupBudgetSeconds 5) }}
      readinessProbe:
        httpGet: {path: /readyz, port: http}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 2
      livenessProbe:  # restarts a process that hangs; waits longer than a weight switch may take
        httpGet: {path: /healthz, port: http}
        periodSeconds: 10
        timeoutSeconds: 10
        failureThreshold: {{ add 6 (div (include "tandem.generatorSeconds" (list $ "switch_timeout_s" 300)) 10) }}
      lifecycle:
        preStop:  # time for the Service to remove this pod's address
          exec: {command: [sleep, "5"]}
      {{- end }}
      resources: {{- include "tandem.resources" $options | nindent 8 }}
      {{- include "tandem.securityContext" $ | nindent 6 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        - {name: token, mountPath: /secrets, readOnly: true}
        - {name: cache, mountPath: /cache, readOnly: true}
        - {name: weights, mountPath: /weights, readOnly: true}
        - {name: weights, mountPath: /leases, subPath: served}
        {{- with $options.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes: {{- include "tandem.volumes" (list $ $options) | nindent 4 }}
{{- end }}

{{- /* Data-parallel size × pipeline-parallel size. A replica's devices divided by it are the tensor-parallel size. */}}
{{- define "tandem.tensorGroups" -}}
{{- $config := include "tandem.config" . | fromYaml }}
{{- mul .Values.generator.dataParallelSize (dig "generator" "vllm" "pipeline_parallel_size" 1 $config) }}
{{- end }}

{{- /* Environment variables with tensor-parallel and data-parallel sizes that use all devices of the replica. */}}
{{- define "tandem.parallel" -}}
{{- $groups := include "tandem.tensorGroups" . }}
{{- with .Values.generator }}{{ if .accelerator.count -}}
- name: TANDEM__GENERATOR__TENSOR_PARALLEL_SIZE
  value: {{ div (mul .accelerator.count .nodesPerReplica) $groups | quote }}
- name: TANDEM__GENERATOR__DATA_PARALLEL_SIZE
  value: {{ .dataParallelSize | quote }}
{{- end }}{{ end }}
{{- end }}
