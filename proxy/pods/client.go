package pods

import (
	"context"
	"fmt"
	"net/http"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
)

// newClient returns a client for core/v1 alone: client-go's clientset would register every API group there is, at some
// megabytes per node. No client-side rate limit: with client-go's default of 5 a second a full node would take half a
// minute to sync; API Priority and Fairness is the server's own protection.
func newClient(config *rest.Config) (*rest.RESTClient, runtime.ClientNegotiator, error) {
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, nil, fmt.Errorf("register core/v1: %w", err)
	}
	scheme.AddKnownTypes(authenticationv1.SchemeGroupVersion, &authenticationv1.TokenRequest{})
	c := rest.CopyConfig(config)
	c.APIPath, c.GroupVersion = "/api", &corev1.SchemeGroupVersion
	c.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	c.AcceptContentTypes, c.ContentType = runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON, runtime.ContentTypeProtobuf
	c.QPS, c.RateLimiter = -1, nil
	c.WarningHandler = rest.NoWarnings{}
	shared, err := rest.HTTPClientFor(c)
	if err != nil {
		return nil, nil, fmt.Errorf("API server client: %w", err)
	}
	// client-go would send the token to whatever host it is led to. An API server leads nobody anywhere.
	hc := *shared // may be http.DefaultClient
	hc.CheckRedirect = func(r *http.Request, _ []*http.Request) error {
		return fmt.Errorf("it redirects to %s://%s, where imdsgate sends nothing: is this the API server?", r.URL.Scheme, r.URL.Host)
	}
	client, err := rest.RESTClientForConfigAndClient(c, &hc)
	if err != nil {
		return nil, nil, fmt.Errorf("API server client: %w", err)
	}
	return client, runtime.NewClientNegotiator(c.NegotiatedSerializer, corev1.SchemeGroupVersion), nil
}

// NodeExists asks whether Options.Node can be this node's name: a pod is bound to it, or, where the right to get nodes is
// there, it exists. In a DaemonSet our own pod is bound to it, so the right is not needed. An unknown name would otherwise
// look like a node without pods: synced, and 503 for everybody.
//
// Where Run knows of a pod it is asked all the same whether pods may be listed, which watches fall back to, but for none of them: an
// API server that answers from the past ignores the limit, and every pod of a full node would come once more.
func (p *Pods) NodeExists(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, p.listTimeout)
	defer cancel()
	selector, bound := p.nodeSelector(), p.Bound() > 0
	if bound {
		const nobody = "-" // no pod can have this name
		selector = fields.AndSelectors(selector, fields.OneTermEqualSelector(metav1.ObjectNameField, nobody))
	}
	var list corev1.PodList
	err := p.client.Get().Resource("pods").VersionedParams(&metav1.ListOptions{
		FieldSelector: selector.String(), Limit: 1, ResourceVersion: "0",
	}, metav1.ParameterCodec).Do(ctx).Into(&list)
	if err != nil {
		return fmt.Errorf("list the pods of node %s: %w", p.node, explainForbidden(err, "list", "pods"))
	}
	if bound || len(list.Items) > 0 {
		return nil
	}
	err = p.client.Get().Resource("nodes").Name(p.node).Do(ctx).Error()
	switch {
	case err == nil:
		return nil
	case apierrors.IsNotFound(err):
		return fmt.Errorf("node %s does not exist: set -node or NODE_NAME to spec.nodeName (downward API)", p.node)
	case apierrors.IsForbidden(err):
		return fmt.Errorf("no pod is bound to node %s, not even this one: set -node or NODE_NAME to spec.nodeName (downward API)", p.node)
	}
	return fmt.Errorf("get node %s: %w", p.node, err)
}

// Bound is how many pods are known to be bound to the node.
func (p *Pods) Bound() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.pods)
}

func (p *Pods) nodeSelector() fields.Selector {
	return fields.OneTermEqualSelector("spec.nodeName", p.node)
}

// explainForbidden says which permission is missing: the verb and resource to put into a role.
func explainForbidden(err error, verb, resource string) error {
	if !apierrors.IsForbidden(err) {
		return err
	}
	return fmt.Errorf("the permission to %s %s is missing, see the ClusterRole of the chart: %w", verb, resource, err)
}
