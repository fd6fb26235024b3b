package growth

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
)

const (
	accountsPerNamespace = 50 // of the cluster; those of the node under test have five each
	podsPerNode          = 40 // of the other nodes
	writers              = 16 // at a time
	roleARN              = "arn:aws:iam::123456789012:role/growth"
)

// containerID is that of every container that no kubelet runs.
const containerID = "containerd://0"

// size is how many pods there are in a cluster beside those of the node under test, and half as many service accounts.
type size int

func (s size) accounts() int { return int(s) / 2 }

// cluster fills an API server with objects that no daemon under test should ever hear of.
type cluster struct {
	kube kubernetes.Interface
	has  size
}

// grow makes what is missing.
func (c *cluster) grow(ctx context.Context, to size) error {
	err := parallel(ctx, c.has.accounts(), to.accounts(), accountsPerNamespace, func(ctx context.Context, i int) error {
		ns := otherNamespace(i)
		if i%accountsPerNamespace == 0 {
			if err := createNamespace(ctx, c.kube, ns); err != nil {
				return err
			}
		}
		return createAccount(ctx, c.kube, ns, fmt.Sprintf("account-%d", i))
	})
	if err != nil {
		return err
	}
	err = parallel(ctx, int(c.has), int(to), 1, func(ctx context.Context, i int) error {
		account := accountOf(i)
		_, err := createPod(ctx, c.kube, otherNamespace(account), fmt.Sprintf("pod-%d", i),
			fmt.Sprintf("other-%d", i/podsPerNode), fmt.Sprintf("account-%d", account))
		return err
	})
	if err != nil {
		return err
	}
	c.has = to
	return nil
}

// accountOf is the service account of a pod: two pods have one.
func accountOf(pod int) int { return pod / 2 }

func otherNamespace(account int) string { return fmt.Sprintf("other-%d", account/accountsPerNamespace) }

// stir changes other nodes' pods, service accounts and namespaces until ctx is done, as many a second as rate says, and
// returns how many it changed.
func (c *cluster) stir(ctx context.Context, rate int) (changes int64, err error) {
	var n atomic.Int64
	tick := time.NewTicker(time.Second / time.Duration(rate))
	defer tick.Stop()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(writers)
	for i := 0; ; i++ {
		select {
		case <-tick.C:
		case <-gctx.Done():
			err := g.Wait()
			if ctx.Err() != nil {
				err = nil
			}
			return n.Load(), err
		}
		g.Go(func() error {
			patch := fmt.Appendf(nil, `{"metadata":{"annotations":{"growth/change":"%d"}}}`, i)
			account := i * 7 % c.has.accounts()
			var err error
			switch o := (metav1.PatchOptions{}); i % 10 {
			case 0:
				_, err = c.kube.CoreV1().Namespaces().Patch(gctx, otherNamespace(account), types.MergePatchType, patch, o)
			case 1, 2:
				_, err = c.kube.CoreV1().ServiceAccounts(otherNamespace(account)).Patch(gctx, fmt.Sprintf("account-%d", account), types.MergePatchType, patch, o)
			default:
				pod := i * 7 % int(c.has)
				_, err = c.kube.CoreV1().Pods(otherNamespace(accountOf(pod))).Patch(gctx, fmt.Sprintf("pod-%d", pod), types.MergePatchType, patch, o)
			}
			if err == nil {
				n.Add(1)
			}
			return err
		})
	}
}

// crowd is the pods of one node, each with a service account of its own, five to a namespace: the most that as many pods
// can cost a daemon.
type crowd struct {
	kube kubernetes.Interface
	node string
	// cas makes each namespace's ConfigMap of the cluster's authorities, as a controller does: kubelets read it.
	cas bool
	net byte // the second byte of the pods' addresses
	has int
}

// populate makes pods until there are so many.
func (c *crowd) populate(ctx context.Context, pods int) error {
	err := parallel(ctx, c.has, pods, 5, func(ctx context.Context, i int) error {
		ns := c.namespace(i)
		if i%5 == 0 {
			if err := createNamespace(ctx, c.kube, ns); err != nil {
				return err
			}
			if c.cas {
				if err := createAuthorities(ctx, c.kube, ns); err != nil {
					return err
				}
			}
		}
		if err := createAccount(ctx, c.kube, ns, c.account(i)); err != nil {
			return err
		}
		return c.run(ctx, i, 0)
	})
	c.has = pods
	return err
}

func (c *crowd) namespace(i int) string { return fmt.Sprintf("%s-%d", c.node, i/5) }
func (c *crowd) account(i int) string   { return fmt.Sprintf("account-%d", i) }

// run makes the pod with a number in its nth life, and reports it as running as its kubelet would.
func (c *crowd) run(ctx context.Context, i, life int) error {
	ns, name := c.namespace(i), fmt.Sprintf("pod-%d-%d", i, life)
	if _, err := createPod(ctx, c.kube, ns, name, c.node, c.account(i)); err != nil {
		return err
	}
	now := metav1.Now()
	// A kubelet writes a pod's status three times until it runs.
	running := corev1.PodStatus{Phase: corev1.PodPending, HostIP: "10.0.0.1", StartTime: &now, Conditions: []corev1.PodCondition{
		{Type: corev1.PodReadyToStartContainers, Status: corev1.ConditionFalse, LastTransitionTime: now},
		{Type: corev1.PodInitialized, Status: corev1.ConditionTrue, LastTransitionTime: now},
		{Type: corev1.PodScheduled, Status: corev1.ConditionTrue, LastTransitionTime: now},
	}}
	for step := range 3 {
		switch step {
		case 1:
			running.Conditions[0].Status = corev1.ConditionTrue
			running.PodIP = fmt.Sprintf("10.%d.%d.%d", c.net, i/200, 10+i%200)
			running.PodIPs = []corev1.PodIP{{IP: running.PodIP}}
		case 2:
			running.Phase = corev1.PodRunning
			running.Conditions = append(running.Conditions, corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: now})
			running.ContainerStatuses = []corev1.ContainerStatus{{
				Name: "main", Image: "registry.example/app:1", ImageID: "registry.example/app@sha256:0", Ready: true, ContainerID: containerID,
				State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: now}},
			}}
		}
		patch, err := json.Marshal(map[string]any{"status": running})
		if err != nil {
			return err
		}
		if _, err := c.kube.CoreV1().Pods(ns).Patch(ctx, name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status"); err != nil {
			return fmt.Errorf("report the status of pod %s/%s: %w", ns, name, err)
		}
	}
	return nil
}

// churn replaces pods, one every interval, until ctx is done; first says how often that was done before.
func (c *crowd) churn(ctx context.Context, interval time.Duration, first int) (replaced int, err error) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for n := first; ; n++ {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return n - first, nil
		}
		i, life := n%c.has, n/c.has
		zero := int64(0)
		err := c.kube.CoreV1().Pods(c.namespace(i)).Delete(ctx, fmt.Sprintf("pod-%d-%d", i, life), metav1.DeleteOptions{GracePeriodSeconds: &zero})
		if err == nil {
			err = c.run(ctx, i, life+1)
		}
		if ctx.Err() != nil {
			// Half done: made whole for whoever comes next.
			if err := c.run(context.WithoutCancel(ctx), i, life+1); err != nil && !apierrors.IsAlreadyExists(err) {
				return n - first, err
			}
			return n - first + 1, nil
		}
		if err != nil {
			return n - first, err
		}
	}
}

// parallel does from..to-1, some of them at a time; each one that stride divides comes first, as it makes what the rest needs.
func parallel(ctx context.Context, from, to, stride int, do func(context.Context, int) error) error {
	pass := func(first bool) error {
		g, ctx := errgroup.WithContext(ctx)
		g.SetLimit(writers)
		for i := from; i < to; i++ {
			if (i%stride == 0) == first {
				g.Go(func() error { return do(ctx, i) })
			}
		}
		return g.Wait()
	}
	if err := pass(true); err != nil {
		return err
	}
	return pass(false)
}

func createNamespace(ctx context.Context, kube kubernetes.Interface, name string) error {
	_, err := kube.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: name, Annotations: map[string]string{"iam.amazonaws.com/allowed-roles": `["` + roleARN + `"]`},
	}}, metav1.CreateOptions{})
	return wrap(err, "namespace "+name)
}

func createAuthorities(ctx context.Context, kube kubernetes.Interface, namespace string) error {
	_, err := kube.CoreV1().ConfigMaps(namespace).Create(ctx, &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "kube-root-ca.crt"}, Data: map[string]string{"ca.crt": strings.Repeat("certificate ", 100)},
	}, metav1.CreateOptions{})
	return wrap(err, "ConfigMap "+namespace+"/kube-root-ca.crt")
}

func createAccount(ctx context.Context, kube kubernetes.Interface, namespace, name string) error {
	_, err := kube.CoreV1().ServiceAccounts(namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{
		Name: name, Annotations: map[string]string{"eks.amazonaws.com/role-arn": roleARN},
		Labels: map[string]string{"app.kubernetes.io/name": name, "app.kubernetes.io/managed-by": "Helm"},
	}}, metav1.CreateOptions{})
	return wrap(err, "service account "+namespace+"/"+name)
}

// createPod makes a pod of ordinary size that is bound to a node. Admission adds its token's volume.
func createPod(ctx context.Context, kube kubernetes.Interface, namespace, name, node, account string) (*corev1.Pod, error) {
	container := corev1.Container{
		Name: "main", Image: "registry.example/app:1", Command: []string{"/app", "--listen=:8080", "--log-level=info"},
		Ports: []corev1.ContainerPort{{ContainerPort: 8080}},
		Resources: corev1.ResourceRequirements{
			Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m"), corev1.ResourceMemory: resource.MustParse("16Mi")},
		},
	}
	for i := range 10 {
		container.Env = append(container.Env, corev1.EnvVar{Name: fmt.Sprintf("APP_SETTING_%d", i), Value: "some value of ordinary length"})
	}
	p, err := kube.CoreV1().Pods(namespace).Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app.kubernetes.io/name": account, "pod-template-hash": "6d4cf56db6"}},
		Spec:       corev1.PodSpec{NodeName: node, ServiceAccountName: account, Containers: []corev1.Container{container}},
	}, metav1.CreateOptions{})
	return p, wrap(err, "pod "+namespace+"/"+name)
}

func wrap(err error, what string) error {
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("make %s: %w", what, err)
	}
	return nil
}
