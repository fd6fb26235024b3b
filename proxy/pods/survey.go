package pods

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/pager"

	"github.com/imdsgate/imdsgate/proxy"
)

// Forecast is what imdsgate would answer to a pod if it ran on the pod's node. It holds no secret.
type Forecast struct {
	Pod         proxy.Pod
	Owner       string // name of its controller, such as a ReplicaSet's; its own where it has none
	HostNetwork bool   // never asks imdsgate
	OwnSource   bool   // its SDKs ask IRSA or EKS Pod Identity first
	// Named is the role that the pod's own annotation names, as kube2iam and kiam without restrictions read it; empty: none that
	// they could read.
	Named   string
	Grant   *proxy.Grant
	Refusal *proxy.Refusal // exactly one of the two is not nil
}

// Survey decides for every pod of the cluster that can still ask, from one list of pods, service accounts and namespaces. It
// watches nothing, needs no rights but list, and asks nobody but the API server. Its order is the API server's: by namespace and
// name.
func Survey(ctx context.Context, config *rest.Config, policy *proxy.Policy) ([]Forecast, error) {
	client, _, err := newClient(config)
	if err != nil {
		return nil, err
	}
	accounts := map[types.NamespacedName]object{}
	err = eachOf(ctx, client, "serviceaccounts", func() runtime.Object { return &corev1.ServiceAccountList{} }, func(o runtime.Object) {
		a := o.(*corev1.ServiceAccount)
		accounts[types.NamespacedName{Namespace: a.Namespace, Name: a.Name}] = accountFacts(a)
	})
	if err != nil {
		return nil, err
	}
	rules := map[string]*proxy.NamespaceRules{}
	err = eachOf(ctx, client, "namespaces", func() runtime.Object { return &corev1.NamespaceList{} }, func(o runtime.Object) {
		n := o.(*corev1.Namespace)
		rules[n.Name] = policy.Compile(namespaceFacts(n).annotations)
	})
	if err != nil {
		return nil, err
	}
	classic := *policy // kube2iam and kiam: the pod's annotation alone, anybody's role
	classic.Issuer, classic.PodAnnotations, classic.NamespacePolicy, classic.DefaultRole = proxy.IssuerAssumeRole, true, proxy.NamespacePolicyOff, ""
	var all []Forecast
	err = eachOf(ctx, client, "pods", func() runtime.Object { return &corev1.PodList{} }, func(o runtime.Object) {
		f := podFacts(o.(*corev1.Pod))
		if f.ended {
			return
		}
		account := accounts[types.NamespacedName{Namespace: f.pod.Namespace, Name: f.pod.ServiceAccount}]
		namespace, ok := rules[f.pod.Namespace]
		if !ok { // made since
			namespace = policy.Compile(nil)
		}
		s := proxy.Subject{
			Pod: f.pod, PodAnnotations: f.annotations, Namespace: namespace,
			ServiceAccountAnnotations: account.annotations, ServiceAccountAbsent: !account.present,
		}
		c := Forecast{Pod: f.pod, Owner: f.pod.Name, HostNetwork: f.hostNetwork, OwnSource: f.ownSource}
		if by := metav1.GetControllerOf(o.(*corev1.Pod)); by != nil {
			c.Owner = by.Name
		}
		c.Grant, c.Refusal, _ = policy.Authorize(s)
		s.ServiceAccountAnnotations = nil
		if today, _, _ := classic.Authorize(s); today != nil {
			c.Named = today.Key.RoleARN
		}
		all = append(all, c)
	})
	return all, err
}

// eachOf lists a resource of all namespaces, page by page.
func eachOf(ctx context.Context, client rest.Interface, resource string, list func() runtime.Object, each func(runtime.Object)) error {
	pages := pager.New(func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		l := list()
		return l, client.Get().Resource(resource).VersionedParams(&o, metav1.ParameterCodec).Do(ctx).Into(l)
	})
	err := pages.EachListItem(ctx, metav1.ListOptions{}, func(o runtime.Object) error {
		each(o)
		return nil
	})
	if err != nil {
		return fmt.Errorf("list %s: %w", resource, explainForbidden(err, "list", resource))
	}
	return nil
}
